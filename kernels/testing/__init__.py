"""What tests, benchmarks and the compile gate need of the kernels: specifications and cases. No run imports it."""

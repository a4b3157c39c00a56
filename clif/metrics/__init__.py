"""Metrics: one HDF5 file per process during a run, merged into RUN/run.h5, summed up in RUN/summary.json."""

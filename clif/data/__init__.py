"""What goes in: instruction data sets, request traces, generated load, and how the demo gets its own."""

"""Inputs of a run: instruction data, request traces, generated load, and the demo's downloads."""

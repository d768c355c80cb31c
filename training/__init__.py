"""The trainer: one optimizer step, averages, router state, checkpoints, telemetry."""

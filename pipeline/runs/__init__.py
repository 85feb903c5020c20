"""One run folder: plan, reuse of other runs, execution, maintenance."""

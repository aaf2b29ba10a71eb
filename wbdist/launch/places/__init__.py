"""Where a job can be submitted to: one file a place, each renders what is submitted and the commands that do it."""

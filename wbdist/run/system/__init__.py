"""System metrics: what this process and this machine are doing, sampled now and then, under W&B's names."""

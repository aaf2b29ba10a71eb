"""The pure domain: values and rules, with no I/O, clock, environment or threads."""

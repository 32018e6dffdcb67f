"""Whether to save: pure functions of the metrics and the counters.

`state` is the `CheckpointState` that a program carries, `step` counts and judges,
`scalars` has the arithmetic that agrees between Python and XLA, `logs` brings metrics
into one form, `direction` knows which way a metric is better, `template` fills in
the filepath, and `reserved` has the names that no filepath may lead to.
"""

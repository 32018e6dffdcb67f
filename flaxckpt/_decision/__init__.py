"""Whether to save: pure functions of the metrics and the counters.

`step` counts and judges, on the `CheckpointState` (in `state`) that a program carries.
It uses `logs`, which brings metrics into one form, and `scalars`, which has the rule
(`improves`) in arithmetic that is the same in Python and XLA. A `moment` is when a call
is made: an epoch, a batch of one, or a global step. `direction` tells whether
a metric is better low or high. `template` fills in the filepath, and `reserved` has the
names that it may not have.
"""

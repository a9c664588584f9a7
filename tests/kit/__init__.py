"""Helpers that the tests of several folders share.

- `models`, `language_models`, `wide`, `packed_bases`, `dense_twins`, `folders`: models to test with
- `specs`: adaptations of specs
- `refusals`: errors and warnings
- `comparing`, `counting`, `depth`: tensors, costs and numbers of parameters
- `training`: short trainings
- `settings`, `places`, `plugins`: the environment of tests
- `warm`, `preloaded`, `forks`, `faults`, `users`: processes and users
- `timing`: the time of a run
"""

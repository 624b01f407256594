"""The stage of the tests, for the test files beside this one."""

from test_jobworker import busy_stage, idle, real, shared, stage

__all__ = ["busy_stage", "idle", "real", "shared", "stage"]

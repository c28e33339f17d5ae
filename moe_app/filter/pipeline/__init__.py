"""Makes datatrove's steps, stages and executors of the filters; imported at use, as it needs it."""

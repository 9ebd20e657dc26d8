"""What is measured of shardq, beside what it would replace. Not shipped; `make bench` runs it."""

"""Load tests with locust: scenarios, checks on every answer, a report."""

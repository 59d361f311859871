"""What ``bvpo run`` is made of: a config becomes jobs, and jobs become finished experiment folders."""

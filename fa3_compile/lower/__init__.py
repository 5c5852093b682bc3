"""From a spec to code that computes it: the choice of a kernel family, its text, its build."""

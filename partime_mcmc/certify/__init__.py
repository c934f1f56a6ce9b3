"""Certificates: the check that a path obeys its kernel, step by step."""

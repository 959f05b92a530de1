"""Tests: the SAM family."""

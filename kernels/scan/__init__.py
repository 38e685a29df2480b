"""Reverse scans over tokens: advantages and returns."""

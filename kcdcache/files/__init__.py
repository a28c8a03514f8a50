"""Bytes that are whole or absent, on disks and in buckets."""

"""Tensors in, tensors out: networks, losses, uncertainty, selection, scores and schedules.

Nothing here knows of Ray, opens a file or prints; nothing called in a training step waits for the device.
"""

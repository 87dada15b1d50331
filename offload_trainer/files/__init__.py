"""Safetensors files, read and written tensor by tensor: nothing is mapped, nothing is copied whole."""

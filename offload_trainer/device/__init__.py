"""What lives on the device: the sliced subnet, the transfers that fill it, and the processes that share the work."""

"""What a run will take of host, device, disk and link, and whether it fits: told before anything is allocated."""

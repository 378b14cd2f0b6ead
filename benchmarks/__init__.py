"""Speed and memory of ILVR, side by side with the published algorithm and with the backbone. Run by `make bench`."""

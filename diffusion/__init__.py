"""DDPM: noise schedules, the Gaussian chain, respaced samplers, and the training objective."""

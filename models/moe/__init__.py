"""Mixture-of-experts layers: a router makes a plan, experts compute it, one combine adds it up."""

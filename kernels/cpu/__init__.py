"""The decode step's ops for CPUs: C sources, compiled by the machine's own compiler when first used."""

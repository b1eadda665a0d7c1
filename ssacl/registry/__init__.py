"""Model versions in object storage, and the channels that point to them."""

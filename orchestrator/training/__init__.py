"""Training of the large model, on one GPU, several or none, and the feature maps it trains on."""

"""Parts of FedGKT beside the paper's algorithm.

`state` is its state, `extractors` the first layers of devices' networks, `received` what devices
have sent, and `evaluation` the accuracy of its networks.
"""

"""`edge-agent measure`: measures what training costs on this device, signs it, and submits it."""

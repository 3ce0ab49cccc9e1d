"""What training costs on this very device: `edge-agent measure`, signed, drawn and submitted."""

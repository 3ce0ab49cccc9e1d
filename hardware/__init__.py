"""What puts Stillhouse on devices: a Debian package, images to flash, a broker's settings."""

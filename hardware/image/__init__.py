"""Images to flash: Raspberry Pi OS with the agent, and the identity of one device.

    build        a vendor's image + the package  ->  an image for the whole fleet
    personalize  writes one device's kit to an image, a card, or a card's mounted boot partition
    fleet        does the same for each line of a CSV file, and lists the images for Raspberry Pi
                 Imager

`build` adds three small files to the root file system: a systemd unit, its link, and the script
first-boot that it runs. The package and the kit lie in the folder `stillhouse` of the FAT boot
partition, which any computer can write to. When that folder holds something at boot, first-boot
installs the package, moves the kit to its place, and removes both from the boot partition. If
something fails, it writes ERROR.txt there.

So nothing depends on how a release is customized (firstrun.sh on Bookworm, cloud-init on Trixie),
and Raspberry Pi Imager's settings (user, Wi-Fi, SSH) still work. sfdisk, mtools and debugfs read
and write partitions and file systems. Nothing is mounted, and only a card needs root.
"""

"""Images to flash: a Raspberry Pi OS image with the agent, and one device's identity on it.

    build        a vendor's image + the package  ->  an image for the whole fleet
    personalize  one device's kit, onto an image, a card, or a card's mounted boot partition
    fleet        the same for each line of a CSV file, and a list for Raspberry Pi Imager

`build` adds three small files to the root file system: a systemd unit, its link, and the script
that it runs, first-boot. All else lies in the folder `stillhouse` of the FAT boot partition, which
any computer can write to: the package, and the kit. At each boot for which that folder holds
something, first-boot installs the package, moves the kit to where it belongs, and takes both from
the boot partition. What it could not do it writes there, to ERROR.txt.

So nothing depends on how a release customizes itself (firstrun.sh on Bookworm, cloud-init on
Trixie), and Raspberry Pi Imager's own settings (user, Wi-Fi, SSH) work as ever. Partitions and file
systems are read and written by sfdisk, mtools and debugfs; nothing is mounted, and root is not
needed but for a card.
"""

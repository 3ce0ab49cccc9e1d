"""Updates over the air: the agent stages a signed package; root installs it, or rolls back.

    orchestrator     tells a device of a newer release (`wire.messages.Update`)
    agent            staging.py: checks the release, pulls the package while there is no order, and
                     writes both to /var/lib/stillhouse/update; last comes a file `ready`, which
                     systemd watches for
    root, packaged   __main__.py: trusts nothing that the agent wrote, checks all of it again with
                     the key in /etc/stillhouse, and keeps the installed package (repack.py)
    root, a copy     install.py: installs the package, and waits until the agent says that it is
                     well; otherwise rolls back. If the version is at fault it is refused for good,
                     else it is tried again

The agent's user can write neither the key, nor root's files in /var/cache/stillhouse, nor anything
that root runs. Root writes nothing into the agent's folder.
"""

"""Updates over the air: the agent stages a signed package, root installs it or goes back.

    orchestrator     tells a device of a newer release (`wire.messages.Update`)
    agent            staging.py: checks it, pulls the package while it has no order, and lays both
                     in /var/lib/stillhouse/update, last a file `ready`, which systemd watches for
    root, packaged   __main__.py: trusts nothing that the agent wrote; checks all of it again with
                     the key of /etc/stillhouse, keeps the installed package (repack.py)
    root, a copy     install.py: installs, waits for the agent to say that it is well, or rolls
                     back; refuses a version for what speaks against it, else it is tried again

The agent's user can write neither the key, nor what root keeps in /var/cache/stillhouse, nor
anything that root runs; root writes nothing into the agent's folder.
"""

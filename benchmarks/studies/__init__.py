"""Questions that a time does not answer; each is ``<name>.py`` with ``main(arguments)`` and options of its own."""

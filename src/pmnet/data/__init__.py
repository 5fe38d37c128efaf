"""Where training bytes come from: files and folders, and synthetic tasks."""

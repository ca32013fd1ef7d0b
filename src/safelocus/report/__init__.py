"""What is shown of results: tables for terminal and page, charts for page and files, and one self-contained page."""

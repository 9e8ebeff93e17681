"""What the project knows about languages: a table of codes and names, and a folder for each
language that it knows more about."""

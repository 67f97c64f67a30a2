"""What users give, checked. Nothing here imports torch or another folder of the project.

errors.py      UserError: a mistake that the user can mend; words for messages
file_kinds.py  what a file is, by its first bytes; JSON files
values.py      values of the types and ranges that are expected of them
"""

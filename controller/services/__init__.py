"""The rules: what may be asked, checked before anything has happened; one transaction, one operation each."""

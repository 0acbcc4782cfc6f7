"""Operations: lists of named steps with do and undo, carried out to one end through every crash."""

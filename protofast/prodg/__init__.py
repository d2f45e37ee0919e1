"""ProDG: prototypes of a frozen classifier without any data, with EPIC and InfoDisent beside it."""

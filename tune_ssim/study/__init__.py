"""What the user wrote, as frozen typed objects: study, space, command."""

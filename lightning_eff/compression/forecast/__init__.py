"""What compression would bring on a link: the link measured, the compressors rehearsed, the advice."""

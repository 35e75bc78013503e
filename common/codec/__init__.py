"""Values as bytes, and back: a value has one spelling, and what arrives in another is refused."""

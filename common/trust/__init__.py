"""Who speaks, and what they signed: identities, signed texts, enrolment, rotation of keys."""

package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// minShortID is the least number of hexadecimal digits that Resolve takes for the beginning of an image ID.
const minShortID = 8

var hexDigits = regexp.MustCompile(`^[0-9a-f]+$`)

// Normalize returns the full form of an image name: "whoami:1" is "docker.io/library/whoami:1", "a/b" is
// "docker.io/a/b:latest". A digest wins over a tag beside it. The error is errdefs.ErrInvalidArgument.
func Normalize(ref string) (string, error) {
	named, err := parseName(ref)
	if err != nil {
		return "", err
	}
	return named.String(), nil
}

func parseName(ref string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("invalid image name %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// parseID returns the image ID that ref spells out in full, with or without "sha256:".
func parseID(ref string) (id string, ok bool) {
	hex := strings.TrimPrefix(ref, "sha256:")
	if len(hex) != digest.SHA256.Size()*2 || !hexDigits.MatchString(hex) {
		return "", false
	}
	return "sha256:" + hex, true
}

// shortID returns what ref may be as the beginning of an image ID.
func shortID(ref string) (prefix string, ok bool) {
	hex := strings.TrimPrefix(ref, "sha256:")
	if len(hex) < minShortID || !hexDigits.MatchString(hex) {
		return "", false
	}
	return "sha256:" + hex, true
}

// isDigested reports whether the full name is of the form name@digest.
func isDigested(name string) bool { return strings.Contains(name, "@") }

// repository returns the full name without tag or digest, "" for the nameless record of an image ID.
func repository(name string) string {
	if _, ok := parseID(name); ok {
		return ""
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return ""
	}
	return named.Name()
}

package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// tokenVersion starts every join token, so that a later format can be told from this one.
const tokenVersion = "knarr1"

// secretBytes is the strength of a join secret: 128 bits cannot be guessed over a network.
const secretBytes = 16

// Token lets a node join: "knarr1.<SHA-256 of the server authority, hex>.<secret>".
type Token struct {
	// CAHash is the hex SHA-256 of the server authority's certificate (DER).
	CAHash string
	// Secret is what the server checks.
	Secret string
}

// String is the form that people copy.
func (t Token) String() string { return strings.Join([]string{tokenVersion, t.CAHash, t.Secret}, ".") }

// ParseToken reads the form of Token.String.
func ParseToken(s string) (Token, error) {
	parts := strings.Split(strings.TrimSpace(s), ".")
	if len(parts) != 3 || parts[0] != tokenVersion || parts[2] == "" {
		return Token{}, fmt.Errorf("this is not a join token: it has the form %s.HASH.SECRET, and `knarr token` on the server prints it", tokenVersion)
	}
	if b, err := hex.DecodeString(parts[1]); err != nil || len(b) != sha256.Size {
		return Token{}, errors.New("the join token is damaged: its second part is not a SHA-256 in hex; copy the whole line that `knarr token` prints")
	}
	return Token{CAHash: parts[1], Secret: parts[2]}, nil
}

func newSecret() (string, error) {
	b := make([]byte, secretBytes)
	if _, err := rand.Read(b); err != nil {
		return "", err
	}
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b)), nil
}

func (a *Authority) loadToken() error {
	path := filepath.Join(a.dir, tokenFile)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return a.RotateJoinToken()
}

// JoinToken is the token that further nodes join with. It stays the same until RotateJoinToken.
func (a *Authority) JoinToken() (Token, error) {
	secret, err := readSecret(filepath.Join(a.dir, tokenFile))
	if err != nil {
		return Token{}, err
	}
	return Token{CAHash: fingerprint(a.serverCA.Leaf), Secret: secret}, nil
}

func readSecret(path string) (string, error) {
	b, err := os.ReadFile(path)
	return strings.TrimSpace(string(b)), err
}

// RotateJoinToken makes a new join secret; the old one is refused from then on, also by a running server. Nodes that
// already joined are not affected. The old one is kept for what it has sealed in an external store, until the server starts again.
func (a *Authority) RotateJoinToken() error {
	s, err := newSecret()
	if err != nil {
		return err
	}
	old, err := readSecret(filepath.Join(a.dir, tokenFile))
	if err == nil {
		err = writeFile(filepath.Join(a.dir, oldTokenFile), []byte(old+"\n"))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeFile(filepath.Join(a.dir, tokenFile), []byte(s+"\n"))
}

// checkSecret compares in constant time.
func (a *Authority) checkSecret(secret string) bool {
	t, err := a.JoinToken()
	return err == nil && t.Secret != "" && subtle.ConstantTimeCompare([]byte(t.Secret), []byte(secret)) == 1
}

// claimNode binds a node's name to the node's own secret at its first join: a second machine cannot take the name of a
// node that is there.
func (a *Authority) claimNode(node, secret string) error {
	sum := sha256.Sum256([]byte(secret))
	want := hex.EncodeToString(sum[:])
	path := filepath.Join(a.dir, nodesDir, node)
	a.mu.Lock()
	defer a.mu.Unlock()
	have, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return writeFile(path, []byte(want))
	}
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(have, []byte(want)) != 1 {
		return errNodeTaken
	}
	return nil
}

var errNodeTaken = errors.New("another machine joined under this name: choose another one with --node-name, or, where that machine is gone, " +
	"run `knarr token forget NAME` on the server")

// ForgetNode frees a node's name for another machine. Forgetting a node that never joined is no error.
func (a *Authority) ForgetNode(node string) error {
	if node != filepath.Base(node) {
		return fmt.Errorf("%q is not a node name", node)
	}
	err := os.Remove(filepath.Join(a.dir, nodesDir, node))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// EncryptionPath is where a server shows and rotates the keys of encryption at rest.
const EncryptionPath = "/knarr/v1/encryption"

// EncryptionStatus is what it answers.
type EncryptionStatus struct {
	// File holds the keys.
	File string `json:"file"`
	// Keys are the names of those in knarr's own file, the one that writes first; none where the file is the operator's.
	Keys []string `json:"keys,omitempty"`
	// Stored counts the stored Secrets by provider/key; those that are not encrypted have the name "".
	Stored map[string]int `json:"stored"`
	// Rewritten counts the Secrets that a rotation wrote anew.
	Rewritten int `json:"rewritten"`
}

func newSecretsEncrypt() *cobra.Command {
	c := &cobra.Command{Use: "secrets-encrypt", Short: "Show or replace the key that Secrets are encrypted with at rest", Args: cobra.ArbitraryArgs, RunE: group}
	c.AddCommand(newEncryptionCommand("status", "Show the keys, and how many Secrets are stored under each", "GET"),
		newEncryptionCommand("rotate", "Make a new key, write every Secret anew with it, then drop the old one", "POST"))
	return c
}

func newEncryptionCommand(name, short, verb string) *cobra.Command {
	var w where
	c := &cobra.Command{
		Use: name, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := w.cluster()
			if err != nil {
				return usageError{err}
			}
			s, err := c.encryption(cmd.Context(), verb)
			if err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), s.text())
			return nil
		},
	}
	w.flags(c)
	return c
}

// encryption asks the cluster's server.
func (c *cluster) encryption(ctx context.Context, verb string) (EncryptionStatus, error) {
	var s EncryptionStatus
	if !exists(AdminKubeconfig(c.dir)) {
		return s, c.errNone()
	}
	client, err := c.client()
	if err != nil {
		return s, err
	}
	answer := client.CoreV1().RESTClient().Verb(verb).AbsPath(EncryptionPath).Do(ctx)
	err = answer.Error() // the server's own words, where it has some
	if apierrors.IsConflict(err) {
		return s, err
	}
	if err != nil {
		return s, fmt.Errorf("ask the server (does it run?): %w", err)
	}
	data, err := answer.Raw()
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(data, &s)
}

func (s EncryptionStatus) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "file: %s\n", s.File)
	if len(s.Keys) > 0 {
		fmt.Fprintf(&b, "keys: %s (the first one writes)\n", strings.Join(s.Keys, ", "))
	}
	if len(s.Keys) > 1 {
		b.WriteString("a rotation has not ended: `knarr secrets-encrypt rotate` goes on with it\n")
	}
	for _, key := range slices.Sorted(maps.Keys(s.Stored)) {
		name := key
		if key == "" {
			name = "not encrypted"
		}
		fmt.Fprintf(&b, "stored under %s: %d Secrets\n", name, s.Stored[key])
	}
	if s.Rewritten > 0 {
		fmt.Fprintf(&b, "written anew: %d Secrets\n", s.Rewritten)
	}
	return b.String()
}

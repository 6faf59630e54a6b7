package vault

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/des"
	"crypto/pbkdf2"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// The earlier tool ran `openssl enc -pbkdf2 -a` on each secret without naming a cipher. That makes plain base64, which
// any password reads; a build of OpenSSL that picked a cipher makes "Salted__", the salt and the ciphertext. Neither
// tells whether it is whole, or whether the password is the right one, so that nothing is ever written in these forms.

// Format is how a secret is stored.
type Format string

const (
	Age     Format = "age"
	Base64  Format = "base64"  // of the earlier tool: not encrypted at all
	OpenSSL Format = "openssl" // of the earlier tool: encrypted, with nothing that would show a change
)

func (f Format) words() string {
	if f == Base64 {
		return "plain base64, which anybody can read"
	}
	return "OpenSSL encrypts, without a proof that it is what was stored"
}

const (
	salted     = "Salted__"
	saltSize   = 8
	iterations = 10_000 // what -pbkdf2 means where nothing is said
	longestKey = 32     // bytes
	maxLegacy  = 1 << 20
)

// scheme is a cipher of openssl enc.
type scheme struct {
	block  func(key []byte) (cipher.Block, error)
	key    int // bytes
	stream bool
}

var schemes = map[string]scheme{
	"aes-256-cbc":  {aes.NewCipher, 32, false},
	"aes-192-cbc":  {aes.NewCipher, 24, false},
	"aes-128-cbc":  {aes.NewCipher, 16, false},
	"des-ede3-cbc": {des.NewTripleDESCipher, 24, false},
	"aes-256-ctr":  {aes.NewCipher, 32, true},
	"aes-192-ctr":  {aes.NewCipher, 24, true},
	"aes-128-ctr":  {aes.NewCipher, 16, true},
}

// tried are the ciphers that a secret is tried with where none is named: the padding of the others can't be checked, and
// with a wrong password some of the garbage would pass for a short secret.
var tried = []string{"aes-256-cbc", "aes-192-cbc", "aes-128-cbc", "des-ede3-cbc"}

// Ciphers lists those that Legacy knows, sorted.
func Ciphers() []string { return slices.Sorted(maps.Keys(schemes)) }

// Legacy has secrets of the earlier tool opened with this cipher of openssl enc, and no other. What comes out may then be
// other things than text, which means that one in 256 wrong passwords goes unnoticed.
func (s *Secrets) Legacy(cipher string) error {
	if _, ok := schemes[cipher]; !ok {
		return fmt.Errorf("cipher %q: these are known: %s", cipher, strings.Join(Ciphers(), ", "))
	}
	s.ciphers = []string{cipher}
	return nil
}

// Format tells how a secret is stored; fs.ErrNotExist where there is none.
func (s *Secrets) Format(name string) (Format, error) {
	if s.vault.Has(name) {
		return Age, nil
	}
	if !s.isLegacy(name) {
		return "", fs.ErrNotExist
	}
	_, format, err := s.decodeLegacy(name)
	return format, err
}

// Migrate encrypts a secret of the earlier tool as it should be, and tells how it was stored. The old file goes once the
// new one was read back. Where there is a new one already, of another value, both stay.
func (s *Secrets) Migrate(name string) (Format, error) {
	value, format, err := s.readLegacy(name)
	if err != nil {
		return format, err
	}
	fresh := !s.vault.Has(name)
	if fresh {
		if err := s.put(name, value, s.Changed(name)); err != nil {
			return format, err
		}
	}
	back, err := s.vault.Get(name)
	switch {
	case err != nil:
		return format, err
	case bytes.Equal(back, value):
		return format, s.removeLegacy(name)
	case fresh:
		return format, fmt.Errorf("%s does not read back as it was written; %s is kept", s.vault.path(name), s.legacyPath(name))
	}
	return format, fmt.Errorf("%s has another value than %s, of the earlier tool: remove the one that is not wanted", s.vault.path(name), s.legacyPath(name))
}

// LegacyNames lists the secrets of which a file of the earlier tool is there, sorted.
func (s *Secrets) LegacyNames() ([]string, error) {
	names, err := s.Names()
	return slices.DeleteFunc(names, func(name string) bool { return !s.isLegacy(name) }), err
}

func (s *Secrets) legacyPath(name string) string { return filepath.Join(s.vault.Dir, name) }

func (s *Secrets) isLegacy(name string) bool {
	if checkName(name) != nil || strings.HasSuffix(name, suffix) {
		return false
	}
	info, err := os.Lstat(s.legacyPath(name))
	return err == nil && info.Mode().IsRegular()
}

func (s *Secrets) removeLegacy(name string) error {
	if err := os.Remove(s.legacyPath(name)); err != nil {
		return err
	}
	return atomicfile.SyncDir(s.vault.Dir)
}

// readLegacy gives the value as the earlier tool delivered it: without the newline at its end.
func (s *Secrets) readLegacy(name string) ([]byte, Format, error) {
	data, format, err := s.decodeLegacy(name)
	if err == nil && format == OpenSSL {
		data, err = s.openSSL(name, data)
	}
	if err != nil {
		return nil, format, err
	}
	data = bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	if len(data) == 0 {
		return nil, format, s.damaged(name, "there is nothing in it")
	}
	return data, format, nil
}

// decodeLegacy undoes the base64.
func (s *Secrets) decodeLegacy(name string) ([]byte, Format, error) {
	info, err := os.Stat(s.legacyPath(name))
	if err != nil {
		return nil, "", err
	}
	if info.Size() > maxLegacy {
		return nil, "", s.damaged(name, "it is too large for a secret")
	}
	data, err := os.ReadFile(s.legacyPath(name))
	switch {
	case err != nil:
		return nil, "", err
	case len(data) == 0:
		return nil, "", s.damaged(name, "it is empty")
	case bytes.HasPrefix(data, []byte(salted)):
		return data, OpenSSL, nil
	}
	decoded, err := base64.StdEncoding.Strict().DecodeString(string(data)) // takes newlines
	if err != nil {
		return nil, "", s.damaged(name, "it is neither age's format nor base64, or was cut short")
	}
	if bytes.HasPrefix(decoded, []byte(salted)) {
		return decoded, OpenSSL, nil
	}
	return decoded, Base64, nil
}

func (s *Secrets) damaged(name, why string) error {
	return fmt.Errorf("%s, of the earlier tool, is %w: %s; restore it from a backup, or store the secret again", s.legacyPath(name), ErrDamaged, why)
}

// openSSL decrypts what openssl enc -pbkdf2 made, with SHA-256.
func (s *Secrets) openSSL(name string, data []byte) ([]byte, error) {
	body := data[len(salted):]
	if len(body) <= saltSize {
		return nil, s.damaged(name, "it was cut short")
	}
	salt, body := body[:saltSize], body[saltSize:]
	password, err := s.legacy()
	if err != nil {
		return nil, fmt.Errorf("can't decrypt %s: %w", s.legacyPath(name), err)
	}
	material, err := pbkdf2.Key(sha256.New, password, salt, iterations, longestKey+aes.BlockSize)
	if err != nil {
		return nil, err
	}
	ciphers, chosen := tried, false
	if s.ciphers != nil {
		ciphers, chosen = s.ciphers, true
	}
	whole := false
	for _, c := range ciphers {
		value, err := schemes[c].open(material, body)
		if errors.Is(err, errNotWhole) {
			continue
		}
		whole = true
		if err == nil && (chosen || isText(value)) {
			return value, nil
		}
	}
	if !whole {
		return nil, s.damaged(name, "it was cut short")
	}
	if chosen {
		return nil, fmt.Errorf("%s: %w, or it is damaged, or of another cipher than %s: check %s", s.legacyPath(name), ErrWrongPassword, ciphers[0], LegacyVariable)
	}
	return nil, fmt.Errorf("%s: %w, or it is damaged, or no text of one of the ciphers %s: check %s, or name the cipher with secrets migrate --cipher", s.legacyPath(name), ErrWrongPassword, strings.Join(tried, ", "), LegacyVariable)
}

var (
	errNotWhole = errors.New("not a whole number of blocks")
	errPadding  = errors.New("wrong padding")
)

// open decrypts with the key and, behind it, the initialisation vector that the password gave. That the padding is right proves little: it is, by chance, for one in 256 wrong passwords.
func (c scheme) open(material, body []byte) ([]byte, error) {
	block, err := c.block(material[:c.key])
	if err != nil {
		return nil, err
	}
	n := block.BlockSize()
	iv := material[c.key : c.key+n]
	out := make([]byte, len(body))
	if c.stream {
		cipher.NewCTR(block, iv).XORKeyStream(out, body)
		return out, nil
	}
	if len(body) == 0 || len(body)%n != 0 {
		return nil, errNotWhole
	}
	cipher.NewCBCDecrypter(block, iv).CryptBlocks(out, body)
	pad := int(out[len(out)-1])
	if pad == 0 || pad > n || !bytes.Equal(out[len(out)-pad:], bytes.Repeat([]byte{byte(pad)}, pad)) {
		return nil, errPadding
	}
	return out[:len(out)-pad], nil
}

// isText tells whether that can be what somebody stored, and not the garbage of a wrong key: of that, one in 10^8 looks so.
func isText(b []byte) bool {
	return len(b) > 0 && utf8.Valid(b) && !bytes.ContainsFunc(b, func(r rune) bool {
		return !unicode.IsPrint(r) && r != '\n' && r != '\r' && r != '\t'
	})
}
